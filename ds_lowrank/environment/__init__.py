"""Which optional packages are installed, whether they are the right ones, and the report of ``doctor``."""
