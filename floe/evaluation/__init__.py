"""Loss, accuracy and router health on test rows."""
