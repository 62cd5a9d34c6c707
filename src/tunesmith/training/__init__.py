"""From a recipe to an adapter: checked, planned, carried out, and gone on with."""
