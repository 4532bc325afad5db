"""All SQL of tallyd: the pool, the migrations, and a store per aggregate."""
