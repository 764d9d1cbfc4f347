"""Methods of other authors. They are written from the papers or run from the authors' packages."""
