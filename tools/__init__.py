"""Programs that measure the code and make pages and pictures of the docs; not part of the package."""
