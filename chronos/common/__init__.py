"""Policy, names, numbers and files: everything both backends share. Imports no torch and no mlx."""
