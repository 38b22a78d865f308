"""An AWS that fails as it is told: between client, workers and the embedded AWS."""
