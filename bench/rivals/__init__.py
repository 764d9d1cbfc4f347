"""Methods of other authors, written from their papers, or run from their packages."""
