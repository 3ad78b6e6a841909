"""The process group's beginning, failures and end."""
