"""The nouns, the rules and the protocols of tallyd. Imports the standard library alone."""
