"""Runs as models behind an OpenAI-compatible API.

server    runs → models, the address, what is printed at start, how it ends
app       HTTP: what may be asked for, at which path
service   what it is answered from: the models, the batch, whether the server is closing
prompts   what a request gives a model to read
asked     a request for replies, and how far each has come
answers   the replies as they go over the wire, whole or as events
gate      who may ask, and how much
connections  who has a place on the wire, and who loses it
reading   whose turn it is to be parsed, rendered and tokenised, beside the server's own thread
refusals  what is wrong with a request, in OpenAI's form
wire      the requests and answers as OpenAI's clients write and read them
openapi   the description of all that
metrics   what is counted
batching  all replies that are being written, token by token, on one copy of the weights
attention each reply's own keys and values, in a step of many
reply     one of them: how it is drawn, what is written, what it keeps meanwhile
page/     the chat page
vllm_command  what serves the same adapters to many users at once
"""
