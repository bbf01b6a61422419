"""Search spaces: files, parameters, ranges."""
