"""A run over photos: settings, the search, the verdict on the files, records and reports."""
