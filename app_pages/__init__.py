"""Pages of the dashboard, and `shared`, what they have in common."""
