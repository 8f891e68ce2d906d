"""The backbone, its stages and its sizes."""
