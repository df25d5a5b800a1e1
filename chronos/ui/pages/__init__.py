"""A module a page; each has `build(face)`, called inside its tab."""
