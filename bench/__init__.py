"""How fast tallyd is, as ratios against a reference in the same run. `python -m bench`; README.md says what each means."""
