"""What the tests of the recipes share."""

from recipe_fixtures import digits_run, made_medmnist  # noqa: F401
