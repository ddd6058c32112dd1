"""An engine that is reached over TLS, and proves itself as the server does."""
import pytest
from conftest import remove_objects
from helpers import OwnEngine, make_certificates
from streaming import Ws

PORT = 2376
SYSTEM = '/etc/ssl/certs/ca-certificates.crt'  # what proxies have in these variables: it knows not our engine


@pytest.fixture
def engine(tmp_path, network):
    certificates = make_certificates(tmp_path / 'certificates')
    made = OwnEngine(tmp_path, network, '--host', f'tcp://127.0.0.1:{PORT}', '--tlsverify',
                     '--tlscacert', str(certificates / 'ca.pem'),
                     '--tlscert', str(certificates / 'server.pem'),
                     '--tlskey', str(certificates / 'server-key.pem')).start()
    made.certificates = certificates
    yield made
    made.close()


def test_an_engine_behind_tls_is_used_whatever_authority_the_environment_names(make_server, engine, tmp_path):
    settings = {'DOCKER_HOST': f'tcp://127.0.0.1:{PORT}', 'DOCKER_TLS_VERIFY': '1',
                'REQUESTS_CA_BUNDLE': SYSTEM, 'CURL_CA_BUNDLE': SYSTEM, 'SSL_CERT_FILE': SYSTEM}
    server = make_server(network=engine.network, DOCKER_CERT_PATH=str(engine.certificates), **settings)
    server.running('over-tls', env={'PRINT': 'echo said over TLS'})
    with engine.network.entered():
        socket = Ws(server)
    with socket:
        socket.send(type='subscribe', workspaceId='over-tls', tail=10)
        server.until(lambda: next(iter(socket))['data'].get('message') == 'said over TLS')
    assert server.call('DELETE', '/api/workspaces/over-tls').status_code == 200

    other = make_certificates(tmp_path / 'other')
    stranger = make_server(network=engine.network, connected=False, DOCKER_CERT_PATH=str(other), **settings)
    stranger.until(lambda: 'CERTIFICATE_VERIFY_FAILED' in ' '.join(stranger.get('/health')['problems']))
    remove_objects(engine.client, server.instance)
