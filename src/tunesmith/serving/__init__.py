"""Runs as models behind an OpenAI-compatible API.

server    runs → models, the address, what is printed at start, how it ends
app       HTTP: what may be asked, by whom, and in which form it is answered
wire      the requests as OpenAI's clients send them
writing   token ids → text, piece by piece, up to a stop string
batching  all replies that are being written, token by token, on one copy of the weights
"""
