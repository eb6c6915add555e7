"""Reads what users bind: gin files, and the settings that they fill."""
