# nginx for tests, kept in target/nginx/. To be sourced after envoy.sh and debian.sh, with the repository as working directory.
# Needs a system with apt, and no root: the Debian packages `nginx` and `libpcre2-8-0` are unpacked and not installed, so that
# no service starts. Elsewhere an nginx on the PATH does.
# shellcheck shell=bash

# Where nginx is, once it was fetched.
nginx=target/nginx/nginx

# One that runs may still lack the module that asks relatch.
nginx_asks() {
    "$nginx" -V 2>&1 | grep -F -- --with-http_auth_request_module >/dev/null
}

# Fetches nginx, unless it is there.
fetch_nginx() {
    if nginx_asks; then
        return
    fi
    rm -rf target/nginx
    mkdir -p target/nginx
    if command -v nginx >/dev/null; then
        ln -s "$(command -v nginx)" "$nginx"
    elif has_packages; then
        step 'fetch nginx'
        if ! (cd target/nginx && unpack_packages nginx libpcre2-8-0); then
            echo 'apt-get cannot download the package nginx: look at its sources, or install nginx 1.22 or later' >&2
            exit 1
        fi
        # Debian keeps it among the programs of administrators.
        mkdir -p target/nginx/unpacked/usr/bin
        ln -s ../sbin/nginx target/nginx/unpacked/usr/bin/nginx
        wrap_unpacked target/nginx nginx
    else
        echo 'nginx is missing and this system has no apt to fetch it with: install nginx 1.22 or later' >&2
        exit 1
    fi
    if ! nginx_asks; then
        echo 'this nginx has no module http_auth_request: install a package of nginx that has it' >&2
        exit 1
    fi
    "$nginx" -v
}
