"""The commands of `fusion recall`, and the stage that makes a corpus of key blocks."""
