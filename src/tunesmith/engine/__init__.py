"""How a step is computed: batches and the loss. Nothing here changes the result, only its cost."""
