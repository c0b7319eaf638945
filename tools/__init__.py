"""What measures the code and makes the pages and pictures of the docs; no part of the package."""
