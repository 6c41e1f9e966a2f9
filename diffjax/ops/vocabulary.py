"""The vocabulary of the token models: special entries first, then the tokens (the layout of fairseq's dictionaries).

Between packages a token is 0 .. K-1; token c is entry SPECIALS + c, and logits have SPECIALS + K columns.
"""

SPECIALS = 5  # <s>, <pad>, </s>, <unk>, <n>
PAD = 1
END = 2  # </s>, also what every sequence starts with
MASK = 3  # <unk>

NO_TOKEN = -1  # instead of a token: hidden from the model, or past the end
