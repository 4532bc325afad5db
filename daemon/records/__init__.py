"""Step 6 of 8, records: pure functions that give a row its identity, its price and its difference to what is stored."""
