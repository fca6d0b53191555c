"""Where mmkern's ops meet other libraries; each module imports its library, and nothing imports these modules."""
