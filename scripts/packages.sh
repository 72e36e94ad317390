# Sourced by the scripts that need more than Python; the one that does defines fail.

# Installs Debian packages with apt-get where that is possible, otherwise one line names them.
install_missing() {
    [ $# -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing $* with apt-get"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    else
        fail "this machine lacks: $*; install them (on Debian: sudo apt-get install $*) and run make again"
    fi
}
