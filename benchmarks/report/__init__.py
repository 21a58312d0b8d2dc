"""What people read of runs and comparisons: Markdown, one HTML page, pictures."""
