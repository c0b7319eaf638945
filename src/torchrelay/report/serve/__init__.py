"""A small page and JSON endpoint that answers by an export."""
