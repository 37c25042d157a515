"""A run over photos: settings, search, verdict on the files, records and reports."""
