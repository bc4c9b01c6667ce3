"""Rows: read, encoded, batched, and their loss."""
