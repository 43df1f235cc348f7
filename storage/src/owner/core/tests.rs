//! The owner alone: scripted replicas.
