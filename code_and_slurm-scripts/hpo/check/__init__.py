"""Is a script fit for a study?  Imported by --check alone, never by a worker that runs trials."""
