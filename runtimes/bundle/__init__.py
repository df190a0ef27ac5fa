"""The bundle: a directory with a manifest that says what each file is."""
