# Sourced by the scripts that test another build of the native extension; they define fail.

# build_apart DIRECTORY CMAKE_ARGUMENT...: builds the extension with other options into the directory, with an
# environment beside it, and leaves in `python` what runs it and in `extension` its path. .venv lends its packages and
# stays as it is.
build_apart() {
    build=$1
    shift
    mkdir -p "$build"
    .venv/bin/cmake -G Ninja -S . -B "$build/cmake" -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
        -DPython_EXECUTABLE="$PWD/.venv/bin/python" "$@" >"$build/build.log" 2>&1 ||
        fail "cmake failed, see $build/build.log"
    .venv/bin/cmake --build "$build/cmake" >>"$build/build.log" 2>&1 ||
        fail "the compiler failed, see $build/build.log"

    # A package tree of its own: the sources as links, the extension beside them.
    rm -rf "$build/package"
    mkdir -p "$build/package/fewbit"
    ln -s "$PWD"/src/fewbit/* "$build/package/fewbit/"
    .venv/bin/cmake --install "$build/cmake" --prefix "$build/package" >>"$build/build.log"
    extension=$(echo "$build"/package/fewbit/_native*.so)
    [ -f "$extension" ] || fail "the extension was not built, see $build/build.log"

    # An environment of its own, because .venv's editable install would come before any path. A .pth file that names
    # .venv's directory adds its packages without running the .pth files in there.
    .venv/bin/python -m venv --without-pip --clear "$build/venv"
    python=$build/venv/bin/python
    site='import sysconfig; print(sysconfig.get_path("platlib"))'
    {
        echo "$build/package"
        .venv/bin/python -c "$site"
    } >"$("$python" -c "$site")/apart.pth"
}
