"""What each claim is judged by: effects with their intervals."""
