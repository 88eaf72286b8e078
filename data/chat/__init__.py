"""Conversations to train on: their messages, the chat template that encodes them, and how far back instructions lie."""
