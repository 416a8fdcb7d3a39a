"""A model behind HTTP: limits, protocol, bodies, decoders, batches, and a server around them.

A request's way:

    protocol   bytes and deadlines
    gate       who asks, and is there room
    app        what is asked
    bodies, kserve      the images in it
    service    decoding, in processes; batching, in a thread that calls the engine; and back
"""
