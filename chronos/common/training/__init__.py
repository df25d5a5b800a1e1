"""Training without a framework: recipes, schedules, and losses as NumPy formulas."""
