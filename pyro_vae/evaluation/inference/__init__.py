"""What a guide falls short of log p(x) by: its family, and its encoder."""
