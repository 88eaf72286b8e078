"""What a training step needs: objectives, optimizers, schedule, curriculum."""
