"""From files of conversations to batches: `conversations` reads, `chat_template` tokenises, `pipeline` batches."""
