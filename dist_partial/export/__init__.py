"""Takes what a run has trained home: deltas, .keras files, SavedModels."""
