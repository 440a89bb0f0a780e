"""What leaves a client and what comes back: payloads, and the pipeline that each one passes."""
