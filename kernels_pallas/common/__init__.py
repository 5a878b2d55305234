"""What several ops share, written once."""
