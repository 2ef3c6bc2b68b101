"""A real S3 API on loopback (moto's server) that can be told to fail, to be slow, or to count."""

import threading
import time
from wsgiref.types import WSGIApplication

import moto.server
import werkzeug.serving


class Server:
    """Objects in memory behind S3's API.

    Attributes:
      url: of the API.
      requests: the methods and paths so far.
      fault: called with a method and a path; gives a status to answer with, or None to serve.
      delay: seconds before each answer.
    """

    def __init__(self):
        self.app: WSGIApplication = moto.server.DomainDispatcherApplication(
            moto.server.create_backend_app
        )
        self.requests, self.fault, self.delay = [], lambda method, path: None, 0.0
        self.server = werkzeug.serving.make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if environ["QUERY_STRING"].startswith("list-type"):
            method = "LIST"
        self.requests.append((method, path))
        time.sleep(self.delay)
        status = self.fault(method, path)
        if status is None:
            return self.app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = {503: "SlowDown", 500: "InternalError", 403: "AccessDenied"}[status]
        body = f"<Error><Code>{code}</Code><Message>told to fail</Message></Error>".encode()
        start_response(f"{status} told", [("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
