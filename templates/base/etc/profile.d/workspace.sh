# A login by ssh begins in the project. Commands given to ssh, scp and rsync keep the home folder, as their users expect.
if [ -n "${SSH_CONNECTION:-}" ] && [ "$PWD" = "$HOME" ] && [ -d "${PROJECT_DIR:-}" ]; then
    cd "$PROJECT_DIR" || true
fi
