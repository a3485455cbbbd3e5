"""What a run leaves to look at: previews, charts, tables and one HTML page."""
