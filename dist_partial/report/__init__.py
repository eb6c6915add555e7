"""Run folders as one HTML page: `runs` reads them, `plots` draws, `page` sets the page."""
