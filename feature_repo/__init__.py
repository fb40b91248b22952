"""The serving side: what Feast stores, how a space reaches it, and how a serving team reads it."""
