"""Parts that every service uses: settings, errors, files and folders, back-off, metrics, versions."""
