"""The one exception that means "the user can mend this"; entry points print it as a single line and exit with 2."""


class UserError(ValueError):
  """A mistake in a config, a path or the data. Its text names the offending value and what would be right."""
