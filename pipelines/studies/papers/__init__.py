"""The papers' tables as data, a file a source document."""
